"""What judges a build: RealisID from the equations, and how far each network, plan and engine is from it."""
