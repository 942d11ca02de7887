"""What writes parts of the repository: the tables of ``docs/``. Not part of the app or the wheel."""
