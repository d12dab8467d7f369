"""Fire on a real server: asked at random, broken at random, compared with the answers given alone."""
