"""D3ToM in the paper's words: the ratio schedule, the deciders' importance, the merge, the merged forward pass."""
