"""What an evaluation found, written for programs, people and terminals."""
