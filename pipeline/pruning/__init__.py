"""One-shot pruning of a dense model: which weights go, and what the kept ones become."""
