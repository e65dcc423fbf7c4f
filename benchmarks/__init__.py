"""Speed and memory of ours beside other libraries, both sides in one run."""
