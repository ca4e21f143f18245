"""Training of one method: the step and its backends, a stage of epochs, recovery, teachers, evaluation."""
