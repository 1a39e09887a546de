"""Pages with pictures, for a browser; imported only when one is written."""
