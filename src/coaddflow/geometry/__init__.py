"""The sphere, boxes, polynomials and world coordinates; nothing of astronomy's objects."""
