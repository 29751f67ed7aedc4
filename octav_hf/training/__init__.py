"""Training beyond the step itself: a teacher, and resuming killed runs."""
