"""Files of a run: weights, checkpoints, results, tables, logs and exports; jobs that start runs."""
