"""What plugins learn from a model whose weights stay as they are: gates, head roles, drafters."""
