"""What a run would take on devices that aren't here: memory, traffic, overlap."""
