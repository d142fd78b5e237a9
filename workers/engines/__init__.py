"""Loading an adapter's file into an engine, to see what becomes of it. Worker processes import this, nobody else."""
