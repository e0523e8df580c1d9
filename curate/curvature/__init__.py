"""Curvature: factors of the Fisher, behaviours, and the test vectors s = H⁻¹∇f that are made of both. No cluster."""
