"""What a run tells of itself: writers of metrics, times, utilisation, memory, compilations and traces."""
