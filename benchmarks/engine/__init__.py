"""The packed engine measured on one device, against plain PEFT and Opacus: one command a table, see ``--help``."""
