"""One module per kind of job: fetch the inputs, call the room that does it, publish the outputs."""
