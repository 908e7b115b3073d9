"""What an answer costs: FLOPs and bytes counted, time and memory measured."""
