"""What a learner uses: the course's exercises, the widgets, the chat window, and one Linear under one scheme."""
