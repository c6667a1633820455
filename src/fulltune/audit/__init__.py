"""What is wrong with the rows of a run: found, judged, proved to help or not; nothing is changed."""
