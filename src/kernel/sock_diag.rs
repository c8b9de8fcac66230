//! Sockets of this network namespace, found and ended (sock_diag(7), include/uapi/linux/inet_diag.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

use super::error::{Doing, Result};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Of `struct nlmsghdr`, of what stands before the socket's identity in `struct inet_diag_msg`, and of `struct inet_diag_sockid`.
const HEADER: usize = 16;
const BEFORE_ID: usize = 4;
const ID: usize = 48;
/// Connections in one of these states (include/net/tcp_states.h).
#[derive(Clone, Copy, Debug)]
pub enum Which {
    /// Established or not.
    All,
    /// To which the other side has said nothing yet.
    Connecting,
}

impl Which {
    fn states(self) -> u32 {
        match self {
            // But TCP_LISTEN.
            Which::All => !(1 << 10),
            // TCP_SYN_SENT.
            Which::Connecting => 1 << 2,
        }
    }
}

/// Ends TCP connections to this address and port, without a word to the other side; says how many. Takes CAP_NET_ADMIN, and a kernel with
/// `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy(address: IpAddr, port: u16, which: Which) -> Result<usize> {
    let doing = || format!("end the connections to {address} port {port} (SOCK_DESTROY)");
    let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
    let socket = socket_with(kind.0, kind.1, kind.2, Some(netlink::SOCK_DIAG)).doing(doing)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5))).doing(doing)?;
    let mut like = [0; ID];
    like[2..4].copy_from_slice(&port.to_be_bytes());
    let mut found = Vec::new();
    let request = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, address, which, &like);
    ask(&socket, &request, |answer| {
        let id = answer.get(BEFORE_ID..BEFORE_ID + ID).and_then(|id| <[u8; ID]>::try_from(id).ok());
        found.extend(id.filter(|id| destination(id, address) == address));
    })
    .doing(doing)?;
    let mut count = 0;
    for id in found {
        match ask(&socket, &self::request(SOCK_DESTROY, NLM_F_ACK, address, which, &id), |_| {}) {
            Ok(()) => count += 1,
            // Gone meanwhile.
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno).doing(doing),
        }
    }
    Ok(count)
}

/// A `struct inet_diag_req_v2` about TCP sockets behind its header.
fn request(kind: u16, flags: u16, like: IpAddr, which: Which, id: &[u8; ID]) -> Vec<u8> {
    let family = if like.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut message = Vec::with_capacity(HEADER + 8 + ID);
    message.extend(((HEADER + 8 + ID) as u32).to_ne_bytes());
    message.extend([kind, NLM_F_REQUEST | flags].map(u16::to_ne_bytes).as_flattened());
    message.extend([0; 8]);
    message.extend([family.as_raw() as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend(which.states().to_ne_bytes());
    message.extend(id);
    message
}

/// The address of the other side, of the family of `like`.
fn destination(id: &[u8; ID], like: IpAddr) -> IpAddr {
    let bytes = &id[20..36];
    match like {
        IpAddr::V4(_) => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        IpAddr::V6(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).expect("sixteen bytes")).into(),
    }
}

/// Sends a request, and gives each answer to `each` until the kernel says that it was the last.
fn ask(socket: &OwnedFd, request: &[u8], mut each: impl FnMut(&[u8])) -> std::result::Result<(), Errno> {
    send(socket, request, SendFlags::empty())?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let (length, _) = recv(socket, &mut buffer, RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(header) = rest.get(..HEADER) {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let message = rest.get(HEADER..length).ok_or(Errno::PROTO)?;
            match u16::from_ne_bytes([header[4], header[5]]) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = message.get(..4).ok_or(Errno::PROTO)?;
                    return match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
                        0 => Ok(()),
                        code => Err(Errno::from_raw_os_error(-code)),
                    };
                }
                _ => each(message),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let request = request(SOCK_DESTROY, NLM_F_ACK, [10, 0, 0, 1].into(), Which::Connecting, &[7; ID]);
        assert_eq!(request.len(), 72);
        assert_eq!(request[..4], 72u32.to_ne_bytes());
        assert_eq!(request[16..20], [2, 6, 0, 0]);
        assert_eq!(request[20..24], 4u32.to_ne_bytes());
        assert_eq!(request[24..], [7; ID]);
    }
}
