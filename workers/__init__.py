"""The pool: claims jobs and runs each in a worker process on a device slot (floor 4)."""
