"""What runs a configuration: its step folders, what each step does, the plan of a run and what it says of itself."""
