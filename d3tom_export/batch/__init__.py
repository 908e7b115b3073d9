"""Many questions from a file, their answers into another: in processes, in order, and on where a kill stopped it."""
