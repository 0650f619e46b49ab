"""One module per task: how its examples are drawn, scored and measured."""
