"""What a layout needs and what it costs, before anything is started: weights, memory, communication, time. Closed formulas of a config."""
