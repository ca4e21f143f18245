"""What turns a method into a trained model: the step, its schedule, checkpoints, evaluation, the record of a run."""
