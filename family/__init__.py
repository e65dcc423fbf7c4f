"""The embedded task: questions about a family, whose true reward can be computed."""
