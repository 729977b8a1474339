"""The small model that learns from the teacher."""
