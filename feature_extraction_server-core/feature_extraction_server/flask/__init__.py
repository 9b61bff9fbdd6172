"""HTTP: the Flask app, and the ways to serve it."""
