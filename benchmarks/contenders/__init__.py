"""The tower as contenders of a benchmark that runs many task queues side by side."""
