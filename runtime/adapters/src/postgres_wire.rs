//! PostgreSQL's protocol, as far as copying rows out of it needs: log in, run statements, take COPY data in place.
//!
//! It exists for speed: a driver makes an object of each row, where here the rows are read from the buffer that they
//! arrived in. It runs over any stream of bytes, so also over a simulated network. What it leaves out is the rest of
//! the protocol, TLS above all: it refuses to run where TLS is asked for.
#![expect(clippy::disallowed_methods, reason = "an adapter opens sockets")]

use std::io;

use bytes::{Buf, BytesMut};
use percent_encoding::percent_decode_str;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use simulacro_core::ports::{Disposition, PortError, Result};
use sqlx::{ConnectOptions, postgres::PgSslMode};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use crate::postgres::{PostgresServer, disposition, errno, within};

/// Room for what has arrived; several hundred rows.
const BUFFER_BYTES: usize = 256 << 10;
/// Longest message. A row that is longer is refused by the decoder's limits anyway.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// Why a conversation with a server ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The connection broke.
    #[error("communicate with the server")]
    Io(#[from] io::Error),
    /// The server said why it will not go on.
    #[error("the server answered: {message}")]
    Server {
        /// SQLSTATE.
        code: String,
        /// The server's words.
        message: String,
    },
    /// The server said something that is not expected here.
    #[error("found {found}, expected {expected}")]
    Protocol {
        /// What was found.
        found: String,
        /// What would have been right.
        expected: &'static str,
    },
}

impl WireError {
    /// The port error, where nothing was to be committed.
    pub(crate) fn classify(self, what: impl Into<String>) -> PortError {
        let (code, disposition) = match &self {
            Self::Io(e) => (errno(e).to_owned(), Disposition::Retryable),
            Self::Server { code, .. } => (code.clone(), disposition(code)),
            Self::Protocol { .. } => ("08P01".to_owned(), Disposition::Permanent),
        };
        PortError { what: what.into(), code: Some(code), disposition, retry_after: None, source: Some(self.into()) }
    }
}

/// Code and text of an error or a notice.
fn complaint(body: &[u8]) -> (String, String) {
    let (mut code, mut message) = (String::new(), String::new());
    for field in body.split(|byte| *byte == 0) {
        match field.split_first() {
            Some((b'C', text)) => code = String::from_utf8_lossy(text).into_owned(),
            Some((b'M', text)) => message = String::from_utf8_lossy(text).into_owned(),
            _ => {}
        }
    }
    (code, message)
}

/// A session. Dropping it closes the connection, whatever is under way.
#[derive(Debug)]
pub(crate) struct Wire<S> {
    stream: S,
    input: BytesMut,
    /// Bytes at the front of `input` that the last message had.
    taken: usize,
    output: BytesMut,
    /// The last warning: an immediate shutdown says nothing else before the connection ends.
    warning: Option<(String, String)>,
}

impl Wire<TcpStream> {
    /// Opens a session with the server's settings.
    pub(crate) async fn connect(server: &PostgresServer) -> Result<Self> {
        let what = || format!("connect to {}", server.address());
        let options = &server.options;
        let plain = match options.get_ssl_mode() {
            PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer => true,
            PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull => false,
        };
        if !plain || options.get_socket().is_some() {
            let what = format!("{}: found TLS or a socket in the file system, expected plain TCP for this reader", what());
            return Err(PortError::permanent(what));
        }
        let open = async {
            let stream = TcpStream::connect((options.get_host(), options.get_port())).await?;
            stream.set_nodelay(true)?;
            // The options keep the password to themselves, except in their URL.
            let url = options.to_url_lossy();
            let password = url.password().map(|p| percent_decode_str(p).collect::<Vec<u8>>());
            let user = options.get_username();
            let parameters = [
                ("user", user),
                ("database", options.get_database().unwrap_or(user)),
                ("application_name", options.get_application_name().unwrap_or("simulacro")),
                ("client_encoding", "UTF8"),
            ];
            Self::start(stream, &parameters, user, password.as_deref()).await
        };
        let mut wire = within(server.connect_timeout, open).await.map_err(|e| e.classify(what()))?;
        within(server.patience(), wire.run(&server.settings())).await.map_err(|e| e.classify(what()))?;
        Ok(wire)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Wire<S> {
    /// Logs in over a stream that has just been opened.
    async fn start(
        stream: S,
        parameters: &[(&str, &str)],
        user: &str,
        password: Option<&[u8]>,
    ) -> std::result::Result<Self, WireError> {
        let input = BytesMut::with_capacity(BUFFER_BYTES);
        let mut wire = Self { stream, input, taken: 0, output: BytesMut::new(), warning: None };
        frontend::startup_message(parameters.iter().copied(), &mut wire.output)?;
        wire.send().await?;
        let no_password =
            || WireError::Server { code: "28P01".into(), message: "a password is asked for, and there is none".into() };
        let mut scram: Option<ScramSha256> = None;
        loop {
            let (tag, body) = wire.message().await?;
            let mut answer = BytesMut::new();
            match (tag, body.split_first_chunk::<4>().map(|(kind, rest)| (u32::from_be_bytes(*kind), rest))) {
                (b'R', Some((0, _))) => {}
                (b'R', Some((3, _))) => frontend::password_message(password.ok_or_else(no_password)?, &mut answer)?,
                (b'R', Some((5, salt))) => {
                    let salt = salt.try_into().map_err(|_| unexpected(tag, "a salt of four bytes"))?;
                    let hash = md5_hash(user.as_bytes(), password.ok_or_else(no_password)?, salt);
                    frontend::password_message(hash.as_bytes(), &mut answer)?;
                }
                (b'R', Some((10, mechanisms))) => {
                    if !mechanisms.split(|byte| *byte == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
                        return Err(unexpected(tag, SCRAM_SHA_256));
                    }
                    let begun = ScramSha256::new(password.ok_or_else(no_password)?, ChannelBinding::unsupported());
                    frontend::sasl_initial_response(SCRAM_SHA_256, begun.message(), &mut answer)?;
                    scram = Some(begun);
                }
                (b'R', Some((11, challenge))) => {
                    let scram = scram.as_mut().ok_or_else(|| unexpected(tag, "no challenge yet"))?;
                    scram.update(challenge)?;
                    frontend::sasl_response(scram.message(), &mut answer)?;
                }
                (b'R', Some((12, proof))) => {
                    let scram = scram.as_mut().ok_or_else(|| unexpected(tag, "no proof yet"))?;
                    scram.finish(proof)?;
                }
                (b'K', _) => {}
                (b'Z', _) => return Ok(wire),
                _ => return Err(unexpected(tag, "a way to log in by password")),
            }
            if !answer.is_empty() {
                wire.output = answer;
                wire.send().await?;
            }
        }
    }

    /// Runs statements and lets their rows go.
    pub(crate) async fn run(&mut self, sql: &str) -> std::result::Result<(), WireError> {
        frontend::query(sql, &mut self.output)?;
        self.send().await?;
        loop {
            match self.message().await? {
                (b'Z', _) => return Ok(()),
                (b'T' | b'D' | b'C' | b'I', _) => {}
                (tag, _) => return Err(unexpected(tag, "the result of a statement")),
            }
        }
    }

    /// Begins a COPY to us. Its bytes come by [`Wire::copied`].
    pub(crate) async fn copy_out(&mut self, sql: &str) -> std::result::Result<(), WireError> {
        frontend::query(sql, &mut self.output)?;
        self.send().await?;
        match self.message().await? {
            (b'H', _) => Ok(()),
            (tag, _) => Err(unexpected(tag, "the beginning of a copy")),
        }
    }

    /// The next bytes of a COPY, where they arrived; `None` at its end. Cancel-safe.
    pub(crate) async fn copied(&mut self) -> std::result::Result<Option<&[u8]>, WireError> {
        loop {
            self.fill().await?;
            match self.input[0] {
                b'd' => return Ok(Some(self.take())),
                b'Z' => {
                    self.take();
                    return Ok(None);
                }
                b'c' | b'C' => {
                    self.take();
                }
                tag => return Err(unexpected(tag, "bytes of a copy, or its end")),
            }
        }
    }

    /// The next bytes of a COPY if they have arrived in whole already. `None` says only that [`Wire::copied`] must be asked.
    pub(crate) fn arrived(&mut self) -> std::result::Result<Option<&[u8]>, WireError> {
        self.input.advance(std::mem::take(&mut self.taken));
        if !self.is_whole()? || self.input[0] != b'd' {
            return Ok(None);
        }
        Ok(Some(self.take()))
    }

    /// Says good-bye.
    pub(crate) async fn close(mut self) -> io::Result<()> {
        frontend::terminate(&mut self.output);
        self.send().await?;
        self.stream.shutdown().await
    }

    async fn send(&mut self) -> io::Result<()> {
        self.stream.write_all_buf(&mut self.output).await?;
        self.stream.flush().await
    }

    /// The next message that is neither a notice nor a setting. A cancelled call loses nothing.
    async fn message(&mut self) -> std::result::Result<(u8, &[u8]), WireError> {
        self.fill().await?;
        let tag = self.input[0];
        Ok((tag, self.take()))
    }

    /// The body of the whole message at the front. It stays there until the next one is asked for.
    fn take(&mut self) -> &[u8] {
        self.taken = 1 + self.length();
        &self.input[5..self.taken]
    }

    /// What the message at the front says of its length, its four bytes included.
    fn length(&self) -> usize {
        u32::from_be_bytes([self.input[1], self.input[2], self.input[3], self.input[4]]) as usize
    }

    /// Whether the message at the front has arrived in whole.
    fn is_whole(&self) -> std::result::Result<bool, WireError> {
        if self.input.len() < 5 {
            return Ok(false);
        }
        let length = self.length();
        if !(4..MESSAGE_BYTES_MAX).contains(&length) {
            let found = format!("a message of {length} bytes");
            return Err(WireError::Protocol { found, expected: "4 bytes to 1 GiB" });
        }
        Ok(self.input.len() > length)
    }

    /// Waits until a whole message is at the front that the caller has to know of.
    async fn fill(&mut self) -> std::result::Result<(), WireError> {
        loop {
            self.input.advance(std::mem::take(&mut self.taken));
            while !self.is_whole()? {
                self.input.reserve(BUFFER_BYTES);
                let read = self.stream.read_buf(&mut self.input).await;
                match read {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return Err(self.lost(read)),
                }
            }
            match self.input[0] {
                b'N' => self.warning = Some(complaint(self.take())),
                b'S' | b'A' => {
                    self.take();
                }
                b'E' => {
                    let (code, message) = complaint(self.take());
                    return Err(WireError::Server { code, message });
                }
                _ => return Ok(()),
            }
        }
    }

    /// Why the connection has ended.
    fn lost(&mut self, read: io::Result<usize>) -> WireError {
        match self.warning.take() {
            Some((code, message)) if code.starts_with("57P") => WireError::Server { code, message },
            _ => match read {
                Err(e) => WireError::Io(e),
                Ok(_) => WireError::Io(io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }
}

fn unexpected(tag: u8, expected: &'static str) -> WireError {
    WireError::Protocol { found: format!("message {:?}", char::from(tag)), expected }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    const READY: &[u8] = b"Z\0\0\0\x05I";

    fn trusted() -> Vec<u8> {
        [message(b'R', &[0, 0, 0, 0]), message(b'S', b"server_version\x0015.18\0"), message(b'K', &[0; 8]), READY.to_vec()]
            .concat()
    }

    /// Logs in to a server that says `script` whatever it is asked, in pieces of `piece` bytes, and then hangs up; copies
    /// from it, and gives the bytes.
    fn copy(script: Vec<u8>, piece: usize) -> std::result::Result<Vec<u8>, WireError> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async move {
            let (ours, theirs) = duplex(piece);
            let (mut listen, mut say) = tokio::io::split(theirs);
            let server = async {
                let _ = say.write_all(&script).await;
                let _ = say.shutdown().await;
            };
            let deaf = async { tokio::io::copy(&mut listen, &mut tokio::io::sink()).await };
            let client = async {
                let mut wire = Wire::start(ours, &[("user", "etl")], "etl", Some(b"x")).await?;
                wire.copy_out("COPY x TO STDOUT").await?;
                let mut got = Vec::new();
                while let Some(bytes) = wire.copied().await? {
                    got.extend_from_slice(bytes);
                    while let Some(bytes) = wire.arrived()? {
                        got.extend_from_slice(bytes);
                    }
                }
                Ok(got)
            };
            let (result, _, _) = tokio::join!(client, server, deaf);
            result
        })
    }

    #[test]
    fn rows_are_taken_whatever_comes_between_and_however_it_is_cut() {
        let rows: Vec<Vec<u8>> = (0..50_u8).map(|i| vec![i; usize::from(i) * 7]).collect();
        let mut script = [trusted(), message(b'H', &[1, 0, 1, 0, 1])].concat();
        for row in &rows {
            script.extend(message(b'd', row));
            script.extend(message(b'N', b"SNOTICE\0C00000\0Mhello\0\0"));
        }
        script.extend([message(b'c', b""), message(b'C', b"COPY 50\0"), READY.to_vec()].concat());
        for piece in [1, 3, 64, 1 << 20] {
            assert_eq!(copy(script.clone(), piece).expect("a good copy"), rows.concat(), "pieces of {piece} bytes");
        }
        // Cut anywhere, it is never taken for whole.
        for length in (0..script.len()).step_by(13) {
            let error = copy(script[..length].to_vec(), 1 << 20).expect_err("the connection is lost").classify("read");
            assert_eq!((error.code.as_deref(), error.disposition), (Some("08006"), Disposition::Retryable), "{length}");
        }
    }

    #[test]
    fn the_servers_last_words_are_the_error() {
        let rows = [message(b'H', &[1, 0, 0]), message(b'd', b"row")].concat();
        let body = |code: &str| format!("SFATAL\0C{code}\0Mwords\0\0").into_bytes();
        for (script, code, disposition) in [
            ([trusted(), rows.clone(), message(b'E', &body("57P01"))].concat(), "57P01", Disposition::Retryable),
            // An immediate shutdown is only a warning, and then silence.
            ([trusted(), rows.clone(), message(b'N', &body("57P01"))].concat(), "57P01", Disposition::Retryable),
            ([trusted(), message(b'E', &body("42703"))].concat(), "42703", Disposition::Permanent),
            (message(b'E', &body("53300")), "53300", Disposition::Retryable),
            (message(b'E', &body("28P01")), "28P01", Disposition::Permanent),
            (message(b'R', &[0, 0, 0, 7]), "08P01", Disposition::Permanent),
            ([trusted(), READY.to_vec()].concat(), "08P01", Disposition::Permanent),
            (vec![b'R', 0, 0, 0, 3], "08P01", Disposition::Permanent),
            (vec![b'R', 0xff, 0xff, 0xff, 0xff], "08P01", Disposition::Permanent),
        ] {
            let error = copy(script, 1 << 20).expect_err("it ends").classify("read");
            assert_eq!((error.code.as_deref(), error.disposition), (Some(code), disposition), "{}", error.chain());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
            logged_in in any::<bool>(),
            piece in 1_usize..100,
        ) {
            let mut script = if logged_in { [trusted(), message(b'H', &[1, 0, 0])].concat() } else { Vec::new() };
            script.extend(message(b'd', &bytes));
            script.extend(bytes);
            for (at, byte) in changes {
                let at = at.index(script.len());
                script[at] = byte;
            }
            let _ = copy(script, piece);
        }
    }
}
