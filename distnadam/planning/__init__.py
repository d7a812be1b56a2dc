"""What a run will need and how long a step will take, computed before it runs."""
