"""What an adapter can be trained to do: one file per task, all behind `train.tasks.protocol.Task`."""
