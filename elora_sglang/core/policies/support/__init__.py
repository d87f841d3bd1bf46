"""What policies remember and estimate: ghosts, demand, clocks, predictors. No policy lives here."""
