//! TCP connections that are ended from outside.

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use csi_driver_squashfs::kernel::sock_diag::{Which, destroy};

#[test]
#[ignore = "needs root: make test-host"]
fn connections_to_one_address_and_port_are_ended_and_no_others() {
    let listen = || TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (one, other) = (listen(), listen());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let connect = |listener: &TcpListener| TcpStream::connect(("127.0.0.1", port(listener))).unwrap();
    let (mut ended, mut kept) = (connect(&one), connect(&other));
    assert_eq!(destroy([127, 0, 0, 2].into(), port(&one), Which::All).unwrap(), 0);
    assert_eq!(destroy([127, 0, 0, 1].into(), port(&one), Which::Connecting).unwrap(), 0);
    assert_eq!(destroy([127, 0, 0, 1].into(), port(&one), Which::All).unwrap(), 1);
    assert!(ended.read(&mut [0]).is_err());
    kept.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(kept.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
}
