"""What a step asks of Ray, whether Ray can hold it, Ray itself, pools of actors, metrics."""
