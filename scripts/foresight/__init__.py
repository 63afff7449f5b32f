"""Commands of foresight: fit it, calibrate its monitor, and look at its predictions."""
