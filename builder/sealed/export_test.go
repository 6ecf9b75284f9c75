package sealed

var CheckForm = checkForm

// Hold keeps all envelopes waiting until release is called.
func Hold() (release func()) {
	turn <- struct{}{}
	return func() { <-turn }
}
