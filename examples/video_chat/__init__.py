"""A conversation about a video, in the browser (``app``) and in the terminal (``terminal``)."""
