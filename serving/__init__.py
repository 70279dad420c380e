"""Ray Serve applications: HTTP around the plain predictor."""
