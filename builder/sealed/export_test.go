package sealed

var CheckForm = checkForm

// Hold takes the turn to open an envelope until the function it returns is called.
func Hold() (release func()) {
	turn <- struct{}{}
	return func() { <-turn }
}
