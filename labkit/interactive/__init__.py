"""What a learner touches: the course's parts, widgets, the chat window, one Linear under one scheme."""
