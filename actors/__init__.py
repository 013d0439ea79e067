"""What runs in workers: the orchestrator actor, the handler actors, the trace actor, and the worker process around them."""
