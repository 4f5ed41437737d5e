"""The judges of a build: RealisID from the equations, and the distance of each network, plan and engine from it."""
