"""HTML pages with pictures. Commands import this package only when they write a page."""
