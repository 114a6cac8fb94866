"""Stage two: train side networks and probes from stored tokens, and compare them with methods inside the backbone."""
