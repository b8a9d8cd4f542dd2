"""What a run would train on, shown to a person."""
