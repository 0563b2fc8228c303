"""Measuring and showing what models do: asking, the timeline of a watched video, the demonstration, benchmarks."""
