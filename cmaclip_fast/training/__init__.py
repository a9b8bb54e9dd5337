"""From a table to a trained model: configuration, loop, checkpoints, comparison."""
