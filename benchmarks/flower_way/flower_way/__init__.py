"""A Flower app to measure against: PEFT clients, one message each."""
