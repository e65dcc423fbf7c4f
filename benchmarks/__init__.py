"""Speed and memory of ours and of other libraries, both sides in one run."""
