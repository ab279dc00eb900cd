"""Producer and quota bound together for a worker: reserve, do the work, publish, settle."""
