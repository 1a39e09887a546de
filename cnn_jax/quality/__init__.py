"""Image corruptions, and the robustness of predictors to these corruptions."""
